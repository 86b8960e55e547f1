"""`UNSUPPORTED`: options of SimpleTuner that would change something here, and what to use instead."""

from typing import Any

from twinflow.train.config.option_types import shown

NEUTRAL = (None, False, 0, "", "none", "default", "no")  # as which every option is accepted

_TWINFLOW = "TwinFlow takes the place of {}: leave it out and set twinflow_enabled"
_FOLDER = "give one folder as instance_data_dir"
_PACKED = "memory_preset 32gb packs the frozen base as int8, 24gb as nf4"
_SORT = "sort the images out beforehand"
_TIMES = "times are drawn as the method says; twinflow.time_dist in the config file changes that"
_LOSS = "the loss is the method's; twinflow.objective.loss in the config file changes it"
_STEPS = "count in steps: "
_OWN = "train it in a loop of your own with twinflow.TwinFlowLoss"
_PATH = "give the model as pretrained_model_name_or_path"
_ONE = "one way is built in, the fastest that was measured"
_UPLOAD = "upload what `twinflow export` writes, with `hf upload`"

# name -> (further values without effect, what to use instead)
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "distillation_method":                (("none",), _TWINFLOW.format("distillation_method")),
    "distillation_config":                ((), _TWINFLOW.format("distillation_config")),
    "scheduled_sampling_max_step_offset": ((), _TWINFLOW.format("scheduled sampling")),
    "model_flavour":                      ((), _PATH),
    "revision":                           ((), "download that revision and give its folder"),
    "variant":                            ((), "download that variant and give its folder"),
    "pretrained_vae_model_name_or_path":  ((), "the pipeline's own VAE is used: put another into its folder"),
    "pretrained_transformer_model_name_or_path": ((), _PATH),
    "pretrained_unet_model_name_or_path": ((), _PATH),
    "pretrained_t5_model_name_or_path":   ((), _PATH),
    "base_model_precision":               (("no_change",), _PACKED),
    "text_encoder_1_precision":           (("no_change",), "text encoders are freed before training: leave it out"),
    "text_encoder_2_precision":           (("no_change",), "text encoders are freed before training: leave it out"),
    "text_encoder_3_precision":           (("no_change",), "text encoders are freed before training: leave it out"),
    "quantize_activations":               ((), _PACKED),
    "lora_type":                          (("standard",), "only standard LoRA is trained"),
    "lycoris_config":                     ((), "only standard LoRA is trained"),
    "use_dora":                           ((), "only standard LoRA is trained"),
    "peft_lora_mode":                     (("standard",), "only standard LoRA is trained"),
    "lora_init_type":                     (("true",), "the adapter starts at zero"),
    "lora_dropout":                       ((), "student and teacher see no dropout"),
    "init_lora":                          ((), "base_lora keeps one underneath; the same command resumes a run"),
    "flux_lora_target":                   (("all",), "name the layers as lora_layers"),
    "slider_lora_target":                 ((), "name the layers as lora_layers"),
    "train_text_encoder":                 ((), "only the transformer is trained"),
    "text_encoder_lr":                    ((), "only the transformer is trained"),
    "layer_freeze_strategy":              ((), "name the layers to train as lora_layers"),
    "controlnet":                         ((), _OWN),
    "control":                            ((), _OWN),
    "tread_config":                       ((), "every token is computed; memory_preset saves memory"),
    "data_backend_config":                ((), _FOLDER),
    "dataset_name":                       ((), f"{_FOLDER}; `hf download` fetches one"),
    "instance_prompt":                    ((), "put the captions into .txt files or a metadata.jsonl"),
    "only_instance_prompt":               ((), "put the captions into .txt files or a metadata.jsonl"),
    "prepend_instance_prompt":            ((), "put the captions into .txt files or a metadata.jsonl"),
    "caption_dropout_probability":        ((), "twinflow_enhanced_ratio trains guidance in"),
    "resolution_type":                    (("pixel_area",), "resolution is meant as pixel_area"),
    "minimum_image_size":                 ((), _SORT),
    "maximum_image_size":                 ((), _SORT),
    "target_downsample_size":             ((), _SORT),
    "delete_unwanted_images":             ((), _SORT),
    "delete_problematic_images":          ((), "skip_bad leaves them out and deletes nothing"),
    "ignore_missing_files":               ((), "skip_bad leaves out what cannot be read"),
    "random_flip":                        ((), "images are encoded once, as they are"),
    "vae_dtype":                          (("bf16", "fp32"), "the VAE computes as it was loaded"),
    "vae_cache_disable":                  ((), "latents are always kept, in cache_dir"),
    "cache_dir_text":                     ((), "use cache_dir"),
    "cache_dir_vae":                      ((), "use cache_dir"),
    "num_train_epochs":                   ((), f"{_STEPS}max_train_steps"),
    "checkpoint_epoch_interval":          ((), f"{_STEPS}checkpointing_steps"),
    "checkpointing_rolling_steps":        ((), f"{_STEPS}checkpointing_steps"),
    "validation_epoch_interval":          ((), f"{_STEPS}validation_steps"),
    "eval_epoch_interval":                ((), f"{_STEPS}eval_steps"),
    "validation_disable":                 ((), "set validation_steps to 0"),
    "validation_prompt_library":          ((), "list them as validation_prompts"),
    "user_prompt_library":                ((), "list them as validation_prompts"),
    "validation_using_datasets":          ((), "list captions as validation_prompts"),
    "num_validation_images":              ((1,), "list a prompt several times in validation_prompts"),
    "validation_randomize":               ((), "the samples of a run are compared: validation_seed fixes them"),
    "validation_guidance_real":           ((1,), "use validation_guidance"),
    "validation_guidance_rescale":        ((), "samples are guided plainly, by validation_guidance"),
    "validation_guidance_skip_layers":    ((), "samples are guided plainly, by validation_guidance"),
    "validation_noise_scheduler":         ((), "TwinFlow samples with its own scheduler"),
    "ema_validation":                     (("ema_only",), "samples come from the EMA where one is kept"),
    "ema_update_interval":                ((1,), "the EMA moves once a step"),
    "evaluation_type":                    ((), "eval_share and eval_steps give a validation loss"),
    "optimizer_config":                   ((), "use adam_beta1, adam_beta2, adam_epsilon and adam_weight_decay"),
    "optimizer_cpu_offload_method":       ((), "optimizer adamw8bit or a memory_preset saves memory"),
    "optimizer_offload_gradients":        ((), "optimizer adamw8bit or a memory_preset saves memory"),
    "optimizer_release_gradients":        ((), "the gradients of a step are needed together, for max_grad_norm"),
    "fuse_optimizer":                     ((), "the gradients of a step are needed together, for max_grad_norm"),
    "grad_clip_method":                   (("norm",), "max_grad_norm bounds the norm"),
    "gradient_precision":                 (("unmodified", "fp32"), "gradients are float32"),
    "gradient_checkpointing_interval":    ((1,), "memory_preset auto chooses by block"),
    "training_dynamo_backend":            ((), "use compile_blocks"),
    "dynamo_backend":                     ((), "use compile_blocks"),
    "attention_mechanism":                (("diffusers",), _ONE),
    "fuse_qkv_projections":               ((), _ONE),
    "scale_lr":                           ((), "give the learning_rate that you want"),
    "lr_scale":                           ((), "give the learning_rate that you want"),
    "loss_type":                          (("l2",), _LOSS),
    "snr_gamma":                          ((), _LOSS),
    "use_soft_min_snr":                   ((), _LOSS),
    "noise_offset":                       ((), "noise is drawn plainly, as the method says"),
    "offset_noise":                       ((), "noise is drawn plainly, as the method says"),
    "input_perturbation":                 ((), "noise is drawn plainly, as the method says"),
    "masked_loss_probability":            ((), "the whole image is trained on"),
    "flow_schedule_shift":                ((1,), _TIMES),
    "flow_schedule_auto_shift":           ((), _TIMES),
    "flow_sigmoid_scale":                 ((), _TIMES),
    "flow_use_beta_schedule":             ((), _TIMES),
    "flux_fast_schedule":                 ((), _TIMES),
    "timestep_bias_strategy":             ((), _TIMES),
    "rescale_betas_zero_snr":             ((), "the scheduler of the model says so itself"),
    "flux_guidance_value":                ((3.5,), "FLUX is told its pipeline's 3.5"),
    "refiner_training":                   ((), _OWN),
    "push_to_hub":                        ((), _UPLOAD),
    "push_checkpoints_to_hub":            ((), _UPLOAD),
    "publishing_config":                  ((), _UPLOAD),
    "webhook_config":                     ((), "report_to writes logs to watch"),
    "logging_dir":                        ((), "logs are kept in output_dir"),
}  # fmt: skip

# Options that have no effect here whatever they are: they tell how a trainer does what is done another way here.
HARMLESS = (
    "accelerator_cache_clear_interval", "aspect_bucket_disable_rebuild", "aspect_bucket_rounding",
    "aspect_bucket_worker_count", "base_model_default_dtype", "checkpointing_use_tempdir", "compress_disk_cache",
    "data_backend_sampling", "dataloader_num_workers", "dataloader_prefetch", "dataloader_prefetch_qlen",
    "debug_aspect_buckets", "debug_dataset_loader", "disable_bucket_pruning", "disable_segmented_timestep_sampling",
    "ema_cpu_only", "ema_foreach_disable", "enable_multiprocessing", "enable_watermark", "eval_dataset_id",
    "eval_dataset_pooling", "eval_timesteps", "flow_use_uniform_schedule", "flux_guidance_mode", "framerate",
    "fully_unload_text_encoder", "hub_model_id", "huber_c", "huber_schedule", "i_know_what_i_am_doing",
    "image_processing_batch_size", "keep_vae_loaded", "local_rank", "lr_end", "lr_num_cycles", "lr_power",
    "max_workers", "metadata_update_interval", "minimal_logging", "model_card_note", "model_card_private",
    "model_card_safe_for_work", "num_eval_images", "offload_during_startup", "override_dataset_config",
    "preserve_data_backend_cache", "print_filenames", "print_sampler_statistics", "push_to_hub_background",
    "quantize_via", "read_batch_size", "report_hardware", "sageattention_usage", "set_grads_to_none",
    "skip_file_discovery", "soft_min_snr_sigma_data", "torch_num_threads", "tracker_image_layout",
    "vae_cache_ondemand", "vae_cache_scan_behaviour", "vae_enable_patch_conv", "vae_enable_slicing",
    "vae_enable_tiling", "validation_disable_unconditional", "validation_on_startup", "validation_seed_source",
    "validation_torch_compile", "validation_torch_compile_mode", "webhook_reporting_interval", "write_batch_size",
)  # fmt: skip


def refuse(name: str, value: Any) -> None:
    """Raises ValueError where an option that is not supported would change something, and says what to use."""
    neutral, instead = UNSUPPORTED[name]
    plain = _plain(value)
    if plain not in ({}, [], ()) and plain not in NEUTRAL + neutral:
        raise ValueError(f"train: {name} is not supported, got {shown(value)}: {instead}")


def _plain(value: Any) -> Any:
    """A text as what it says, `0` and `0.0` and `false` alike."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    try:
        return float(text)
    except ValueError:
        return {"false": False, "null": None}.get(text, text)
