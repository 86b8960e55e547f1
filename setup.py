"""Builds `twinflow_kernels._C` with ninja: C++ for the CPU at three instruction sets, CUDA C++ when nvcc is found.

The native code includes nothing of torch, so this build needs no torch and its result serves every torch.

Environment:
    TWINFLOW_BUILD_NATIVE     1 (default) or 0: install Python and Triton only
    TWINFLOW_BUILD_CUDA       auto (default: when nvcc is found), 1 (nvcc is required) or 0
    TWINFLOW_SANITIZE         comma list for -fsanitize, e.g. address,undefined (a developer's build)
    TORCH_CUDA_ARCH_LIST      default "8.0;9.0+PTX"
    CXX, CUDA_HOME            the compilers
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fopenmp -Wall -Wextra"
# One object per instruction set and operation; the binding picks at run time.
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --fmad=false"


def _setting(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"twinflow build: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _find_cxx() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++"]:
        path = shutil.which(name.split()[0])
        if path:
            return name
    sys.exit(
        f"twinflow build: no C++17 compiler found (looked for {wanted or 'g++, c++'}).\n"
        "Install one (Debian/Ubuntu: apt-get install g++; conda: conda install gxx), or set CXX,\n"
        "or set TWINFLOW_BUILD_NATIVE=0 for a Python and Triton install without the compiled CPU and CUDA kernels."
    )


def _find_nvcc() -> str | None:
    mode = _setting("TWINFLOW_BUILD_CUDA", "auto", ("auto", "0", "1"))
    if mode == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    nvcc = next((p for p in map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]) if p), None)
    if nvcc is None and mode == "1":
        sys.exit("twinflow build: TWINFLOW_BUILD_CUDA=1 but nvcc was not found; set CUDA_HOME or put nvcc on PATH")
    return nvcc


def _find_cudart(nvcc: str) -> Path:
    """The static CUDA runtime of nvcc's toolkit; nvcc itself is asked, as the one on PATH may be a wrapper script."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dryrun)
    toolkit = Path(top[1] if top else Path(nvcc).resolve().parent.parent)
    for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
        if (path := toolkit / folder / "libcudart_static.a").exists():
            return path.resolve()
    sys.exit(f"twinflow build: libcudart_static.a was not found under {toolkit}; set TWINFLOW_BUILD_CUDA=0")


def _find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        path = shutil.which("ninja")
    if path is None:
        sys.exit("twinflow build: ninja was not found; pip install ninja")
    return path


def _gencode_flags() -> str:
    """Translates TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") into nvcc's -gencode options."""
    flags = []
    for arch in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not found:
            sys.exit(f"twinflow build: TORCH_CUDA_ARCH_LIST must list versions such as 8.0;9.0+PTX, got {arch!r}")
        number = found[1] + found[2] + found[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(build_dir: Path, output: Path, include_dirs: list[str]) -> Path:
    """Writes build.ninja for the extension and returns its path."""
    cxx, nvcc = _find_cxx(), _find_nvcc()
    sanitize = os.environ.get("TWINFLOW_SANITIZE", "")
    # A developer's build stops at warnings; a user's, with a compiler nobody has tried yet, does not.
    extra = " -Werror" if sanitize else ""
    extra += f" -fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1" if sanitize else ""
    includes = " ".join(f"-I{_escape(d)}" for d in [ROOT / "csrc", *include_dirs])
    arch_defines = " ".join(f"-DTWINFLOW_ISA_{isa.upper()}" for isa in ISA_FLAGS)
    lines = [
        f"builddir = {_escape(build_dir)}",
        f"cxxflags = {CXX_FLAGS}{extra} {includes}",
        "rule cxx",
        "  description = C++ $out",
        f"  command = {cxx} $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  description = CUDA $out",
        f"  command = {nvcc} {NVCC_FLAGS} {_gencode_flags()} {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = link $out",
        f"  command = {cxx} -shared{extra} $in -o $out $libs",
    ]
    objects = []

    def add(rule: str, source: Path, suffix: str = "", flags: str = "") -> None:
        obj = build_dir / f"{source.stem}{suffix}.o"
        objects.append(_escape(obj))
        lines.extend([f"build {_escape(obj)}: {rule} {_escape(source)}", f"  flags = {flags}"])

    for source in sorted((ROOT / "csrc").glob("*_cpu.cpp")):
        for isa, flags in ISA_FLAGS.items():
            add("cxx", source, f".{isa}", f"-DTWINFLOW_ISA={isa} {flags}")
    add("cxx", ROOT / "csrc" / "bindings.cpp", "", f"-DTWINFLOW_CUDA={int(nvcc is not None)} {arch_defines}")
    libs = ""
    if nvcc:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            add("nvcc", source)
        # cudart is linked statically: the module loads on machines without a GPU or CUDA.
        libs = f"{_escape(_find_cudart(nvcc))} -ldl -lrt -lpthread"
    # No -fopenmp at link time: OpenMP symbols resolve to the runtime torch has loaded, so that the process keeps
    # one thread pool (twinflow_kernels/_backend.py loads the system's when there is none).
    lines.extend([f"build {_escape(output)}: link {' '.join(objects)}", f"  libs = {libs}"])
    ninja_file = build_dir / "build.ninja"
    ninja_file.write_text("\n".join(lines) + "\n")
    return ninja_file


class NinjaBuild(build_ext):
    """Hands the extension to ninja instead of compiling file by file."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        include_dirs = [pybind11.get_include(), *self.compiler.include_dirs]
        ninja_file = write_ninja(build_dir, output, include_dirs)
        subprocess.run([_find_ninja(), "-f", str(ninja_file)], check=True)


native = _setting("TWINFLOW_BUILD_NATIVE", "1", ("0", "1")) == "1"
if native and platform.system() != "Linux":
    sys.exit(
        f"twinflow build: the compiled kernels support Linux (and WSL2), this is {platform.system()}; "
        "set TWINFLOW_BUILD_NATIVE=0 for the pure-Python reference kernels"
    )
setup(
    ext_modules=[Extension("twinflow_kernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": NinjaBuild},
)
