"""`FAMILY`: the names of `model_family`, and why others cannot be trained."""

from twinflow.models.registry import REGISTRATIONS
from twinflow.train.config.option_types import Kind

_OWN_LOOP = "it has no family here; twinflow.models.load(family='generic') takes it in a training loop of your own"
_VIDEO = "video models are not trained here"
_EDIT = "edit models, which look at a second image, are not trained here"
_PIXART = "no bridge reads its prediction of noise and variance as a velocity; sana is its successor"
_CASCADE = "a cascade of several models is not trained here"

_REFUSED = {
    "pixart": _PIXART, "pixart_sigma": _PIXART, "pixart-sigma": _PIXART, "smoldit": _PIXART,
    "deepfloyd": _CASCADE, "cascade": _CASCADE, "stable_cascade": _CASCADE,
    "kolors": "its text encoder is not known here; sdxl has the same network",
    "legacy": "say sd1x or sd2x", "qwen_image_edit": _EDIT, "qwen-image-edit": _EDIT, "flux_kontext": _EDIT,
    "omnigen": _EDIT, "generic": _OWN_LOOP,
    **dict.fromkeys(("wan", "wan_s2v", "ltxvideo", "ltxvideo2", "hunyuanvideo", "sanavideo", "kandinsky5-video",
                     "longcat_video", "cosmos", "mochi"), _VIDEO),
    **dict.fromkeys(("auraflow", "chroma", "cosmos2image", "ernie", "flux2", "hidream", "hunyuan", "kandinsky5-image",
                     "krea2", "longcat_image", "lumina2", "z_image_omni", "z-image-omni"), _OWN_LOOP),
}  # fmt: skip


def _read(value: object) -> str:
    names = {alias: name for name, entry in REGISTRATIONS.items() if entry.trains for alias in (name, *entry.aliases)}
    if not isinstance(value, str):
        raise TypeError
    return names[value]


FAMILY = Kind(f"one of {', '.join(name for name, entry in REGISTRATIONS.items() if entry.trains)}", _read, _REFUSED)
