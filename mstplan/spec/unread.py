"""Tells which configs the formula cannot count: families of transformers without a row, and files with fields that it does not read.

A file that names no family of transformers is planned as a Llama's only when each of its fields is known: read by the planner, or
listed here as one that decides no memory. Loaded for files without a row alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from ..errors import UnreadError, one_line, quoted

LLAMA_LIKE = "llama-like"
ASSUME = "--assume llama-like counts it as a Llama all the same."
WAY_OUT = f"mstplan max-seq, plan and trace answer by the trace where torch is installed (pip install 'mstplan[torch]'); {ASSUME}"


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ_FIELDS = _word_set(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size intermediate_size max_position_embeddings hidden_act "
    "hidden_activation attention_bias mlp_bias attention_dropout tie_word_embeddings final_logit_softcapping partial_rotary_factor sliding_window "
    "use_sliding_window max_window_layers sliding_window_pattern layer_types rope_parameters rope_scaling quantization_config dtype torch_dtype "
    "num_experts num_local_experts n_routed_experts kv_lora_rank"
)
"""Of a file without a row."""
CONDITIONAL_FIELDS: Mapping[tuple[str, ...], frozenset[str]] = {
    ("num_experts", "num_local_experts", "n_routed_experts"): _word_set(
        "num_experts_per_tok experts_per_token moe_intermediate_size n_shared_experts first_k_dense_replace moe_layer_freq decoder_sparse_step "
        "mlp_only_layers scoring_func topk_method n_group topk_group norm_topk_prob routed_scaling_factor router_aux_loss_coef aux_loss_alpha "
        "seq_aux output_router_logits router_jitter_noise router_z_loss_coef ep_size"
    ),
    ("kv_lora_rank",): _word_set("q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"),
}
"""Fields that are read beside one of these alone; alone they belong to parts that nothing else tells of."""
NEUTRAL_FIELDS = _word_set(
    # what the file is, and who made it
    "model_type architectures auto_map transformers_version _name_or_path name_or_path model_name _commit_hash unsloth_version unsloth_fixed "
    "tokenizer_class keys_to_ignore_at_inference "
    # how it is run
    "use_cache attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation "
    "use_flash_attn use_flash_attention _flash_attn_2_enabled pretraining_tp return_dict output_hidden_states output_attentions torchscript use_bfloat16 "
    "is_decoder is_encoder_decoder chunk_size_feed_forward gradient_checkpointing "
    # numbers of the same size whatever they are
    "initializer_range initializer_factor init_std rms_norm_eps rope_theta rope_local_base_freq rope_interleave rope_interleaved "
    "original_max_position_embeddings max_sequence_length model_max_length seq_length z_loss_weight "
    # classification and generation
    "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix classifier_dropout max_length min_length max_new_tokens "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss"
)
"""Fields that decide no memory."""
_NEUTRAL_SUFFIXES = ("_token_id", "_token_ids", "_token_index")
_SWITCH_WORDS = _word_set(
    "no non not without disable disabled skip gate gated glu swiglu geglu rms rmsnorm rope rotary norm layernorm causal"
)
"""Words of switches that are off in what is no Llama."""


def unread_fields(config: Mapping[str, object]) -> list[str]:
    """The fields of a file without a row that may decide memory and are not read, in the file's order."""
    known_names = READ_FIELDS | NEUTRAL_FIELDS
    for names, beside in CONDITIONAL_FIELDS.items():
        if any(name in config for name in names):
            known_names |= beside
    return [
        name
        for name, value in config.items()
        if name not in known_names and not name.endswith(_NEUTRAL_SUFFIXES) and not _is_off(name, value)
    ]


def _is_off(name: str, value: object) -> bool:
    """Whether the value says that what the field is about is not there."""
    if value is False:
        words = set(name.lower().split("_"))
        return "qk" in words or not _SWITCH_WORDS & words
    return value is None or value == 0 or value in ("", [], {})


def refuse_fields(name: str, fields: Collection[str]) -> None:
    """Refuses a file with fields that are not read, if there are any."""
    if not fields:
        return
    verb = "is a field" if len(fields) == 1 else "are fields"
    refuse_unread(
        name, f"{list_names(fields)} {verb} that mstplan does not read, so its memory cannot be counted from the file."
    )


def foreign_fields(
    config: Mapping[str, object], expert_fields: Collection[str], routed_fields: Collection[str]
) -> list[str]:
    """Those of `expert_fields` that a file of a known family has, but that family not. routed_fields: those that it reads, if it
    has experts."""
    known_names = NEUTRAL_FIELDS | (
        {*READ_FIELDS, *CONDITIONAL_FIELDS["num_experts", "num_local_experts", "n_routed_experts"], *routed_fields}
        if routed_fields
        else frozenset()
    )
    return [name for name in expert_fields if name not in known_names and not _is_off(name, config[name])]


def refuse_family(name: str, model_type: str, fields: Collection[str]) -> None:
    """Refuses families of transformers that are no Llamas, and other hybrids, by name and by the fields that are not read."""
    fields_words = f"; it has {list_names(fields)}" if fields else ""
    if model_type.lower() in _HYBRIDS:
        refuse_unread(
            name,
            f"mstplan's formula counts no state-space, recurrent or hybrid models (model_type {quoted(model_type)}){fields_words}.",
        )
    if {model_type, model_type.lower()} & (TRANSFORMERS_TYPES | _REMOTE):
        refuse_unread(
            name, f"mstplan does not read configs of this family yet (model_type {quoted(model_type)}){fields_words}."
        )


def refuse_names(name: str, model_type: str, missing: Collection[str]) -> None:
    """Refuses a file that says elsewhere what is asked for."""
    family = f"model_type {quoted(model_type)}" if model_type else "no model_type"
    refuse_unread(
        name, f"mstplan does not read this family's names of fields ({family}) yet: it finds no {list_names(missing)}."
    )


def refuse_unread(name: str, reason: str) -> NoReturn:
    raise UnreadError(name, reason, WAY_OUT)


def list_names(fields: Collection[str], max_names: int = 4) -> str:
    names = [one_line(name, 60) for name in list(fields)[:max_names]]
    return ", ".join(names) + (f" and {len(fields) - max_names} more" if len(fields) > max_names else "")


_HYBRIDS = _word_set(
    "bailing_hybrid falcon_mamba jamba kimi_linear mamba minimax olmo_hybrid "
    "plamo2 recurrent_gemma rwkv rwkv5 rwkv6 rwkv7 xlstm zamba zamba2 zaya"
)
_REMOTE = _word_set("qwen")
"""Families with code of their own whose fields have a Llama's names, but mean something else: Qwen-1's intermediate_size is two MLPs'."""
TRANSFORMERS_TYPES = _word_set(
    """
    EvollaModel afmoe aimv2 aimv2_text_model aimv2_vision_model align_text_model align_vision_model altclip_text_model altclip_vision_model
    aria aria_text audioflamingo3 audioflamingo3_encoder autoformer axk1 axk2 aya_vision bark beam biogpt bit bitnet blip-2 blip_2_qformer
    blip_2_vision_model blip_text_model blip_vision_model blt blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower
    bridgetower_text_model bridgetower_vision_model bros canary canary_decoder canine chameleon chameleon_vqgan chinese_clip_text_model
    chinese_clip_vision_model chmv2 clap_audio_model clap_text_model clipseg_text_model clipseg_vision_model clvp clvp_decoder clvp_encoder
    cohere2_moe cohere2_vision cohere_asr cohere_compass cohere_compass_text cohere_compass_vision colmodernvbert colpali colqwen2
    conditional_detr cosmos3_edge cosmos3_edge_text cosmos3_edge_vision cosmos3_omni cpmant csm csm_depth_decoder_model ctrl cvt d_fine dab-detr dac
    data2vec-audio data2vec-vision dbrx decision_transformer deepseek_ocr2 deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model deepseek_ocr2_text
    deepseek_ocr2_vision deepseek_v4 deepseek_vl deepseek_vl_hybrid deformable_detr deimv2 depth_anything depth_pro dia dia_decoder
    dia_encoder diffllama diffusion_gemma diffusion_gemma_text dinat dinov2_with_registers dinov3_convnext doge donut-swin dots3_note
    dots3_note_audio_encoder dots3_note_text dots3_note_vision_encoder dpr dpt edgetam edgetam_mask_decoder edgetam_prompt_encoder edgetam_video
    edgetam_video_mask_decoder edgetam_video_prompt_encoder edgetam_vision_model efficientloftr embedding_gemma2 embedding_gemma2_text emu3
    emu3_text_model emu3_vqgan encodec eomt eomt_dinov3 ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision esmc esmfold2
    evolla exaone4_5 exaone4_5_vision fast_vlm fastspeech2_conformer fastspeech2_conformer_hifigan
    fastspeech2_conformer_with_hifigan flava flava_image_codebook flava_image_model flava_multimodal_model flava_text_model flint
    florence_vision focalnet fun_asr_nano fun_asr_nano_encoder fuyu gemma3 gemma3n gemma3n_audio gemma3n_vision gemma4 gemma4_assistant
    gemma4_audio gemma4_unified gemma4_unified_assistant gemma4_unified_audio gemma4_unified_text gemma4_unified_vision gemma4_vision git
    git_vision_model glm46v glm4v glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text glm4v_vision glm5_next glm5_next_text
    glm5_next_vision glm_image glm_image_text glm_image_vision glm_image_vqmodel glm_moe_dsa glm_ocr glm_ocr_text glm_ocr_vision glmasr glmasr_encoder
    glmga glpn got_ocr2 got_ocr2_vision gpt-sw3 gpt_neo gpt_neox_japanese gradium_phonon_tts granite4_vision granite4_vision_text
    granite_docling granite_docling_text granite_docling_vision granite_speech granite_speech5_ctc granite_speech5_encoder granite_speech_encoder
    granite_speech_plus granite_speech_plus_encoder granite_swa granitemoe_swa grounding-dino groupvit_text_model groupvit_vision_model
    gte hgnet_v2 higgs_audio_v2 higgs_audio_v2_tokenizer hrm_text hunyuan_vl hunyuan_vl_text hunyuan_vl_vision
    hy_v3 hy_v4 hyperclovax_vision_v2 idefics idefics2 idefics2_perceiver idefics2_vision idefics3 idefics3_vision idefics_perciever
    idefics_vision imagegpt informer inkling2 inkling2_text inkling2_vision inkling_audio inkling_mm_model inkling_text inkling_vision instructblip
    instructblip_qformer instructblip_vision_model instructblipvideo instructblipvideo_qformer instructblipvideo_vision_model internvl internvl_vision
    janus janus_vision_model janus_vqgan jetmoe jev jina_embeddings_v3 kimi_k25 kimi_k25_vision kolibri1 kosmos-2 kosmos-2.5 kosmos_2_5_text_model
    kosmos_2_5_vision_model kosmos_2_text_model kosmos_2_vision_model kyutai_speech_to_text laguna lasr_ctc lasr_encoder layoutxlm lfm2_vl lfm3 lfm3_vl
    lfm3_vl_vision lightglue lighton_ocr lilt llama4 llama4_vision_model llava llava_next llava_next_video llava_onevision longcat_flash
    lw_detr lw_detr_vit lxmert mask2former maskformer maskformer-swin metaclip_2_text_model metaclip_2_vision_model mgp-str mimi mimi_decoder
    mimi_encoder mimo_v2_flash minicpm3 minicpm_ocr minicpm_ocr_vision minicpmv4_6 minicpmv4_6_vision minicpmv4_7 minicpmv4_7_vision
    minimax_m3_vl minimax_m3_vl_text minimax_m3_vl_vision mistral3 mistral4 mistral_large4 mistral_large4_text mlcd mlcd_vision_model mllama
    mllama_text_model mllama_vision_model mm-grounding-dino mobilenet_v1 mobilevitv2 modernbert-decoder modernvbert molmo2 molmo2_adapter molmo2_text
    molmo2_vision moonshine_streaming moonshine_streaming_encoder moshi moshi_depth moss_transcribe_diarize moss_transcribe_diarize_audio mpt muse_glimmer
    muse_glimmer_assistant muse_glimmer_text muse_glimmer_vision muse_spark muse_spark_audio muse_spark_text muse_spark_vision musicflamingo musicgen
    musicgen_decoder musicgen_melody musicgen_melody_decoder nanochat nemo_speechlm nemotron3_5_asr nemotron3_5_transcribe_asr_audio
    nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization nemotron3_diarization_audio nemotron_asr_streaming
    nemotron_asr_streaming_encoder nemotron_h_omni neomme neucodec nougat olmo omdet-turbo oneformer openai-gpt openai_privacy_filter ovis2
    ovis2_vision owlv2 owlv2_text_model owlv2_vision_model owlvit_text_model owlvit_vision_model paddleocr_vl paddleocr_vl_text paddleocr_vl_vision
    paligemma parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt patchtsmixer patchtst pe_audio pe_audio_encoder pe_audio_video
    pe_audio_video_encoder pe_video pe_video_encoder perception_lm persimmon phi4_multimodal phi4_multimodal_audio phi4_multimodal_vision phimoe pi0
    pix2struct_text_model pix2struct_vision_model pixio pixtral pocket_tts pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder
    pocket_tts_audio_tokenizer_encoder poolformer pp_chart2table pp_chart2table_vision pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 pp_formulanet
    pp_formulanet_text pp_formulanet_vision pp_lcnet pp_lcnet_v3 pp_lcnet_v4 pp_ocrv5_mobile_det pp_ocrv5_mobile_rec pp_ocrv5_server_det
    pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec prompt_depth_anything pvt pvt_v2 qianfan_ocr
    qianfan_ocr_vision qwen2_5_omni qwen2_5_omni_audio_encoder qwen2_5_omni_bigvgan qwen2_5_omni_dit qwen2_5_omni_talker qwen2_5_omni_thinker
    qwen2_5_omni_token2wav qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_vision qwen2_audio qwen2_audio_encoder
    qwen2_vl qwen2_vl_vision qwen3_5_moe_vision qwen3_5_vision qwen3_asr qwen3_asr_encoder qwen3_omni_moe qwen3_omni_moe_audio_encoder
    qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_omni_moe_vision_encoder qwen3_vl
    qwen3_vl_moe qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp qwen4_exp_text qwen4_exp_vision radio rag reformer rf_detr
    rf_detr_dinov2 rt_detr rt_detr_resnet rt_detr_v2 sam2 sam2_hiera_det_model sam2_mask_decoder sam2_prompt_encoder sam2_video sam2_video_mask_decoder
    sam2_video_prompt_encoder sam2_vision_model sam3 sam3_detr_decoder sam3_detr_encoder sam3_geometry_encoder sam3_lite_text sam3_lite_text_detr_decoder
    sam3_lite_text_detr_encoder sam3_lite_text_geometry_encoder sam3_lite_text_mask_decoder sam3_lite_text_text_model sam3_mask_decoder sam3_tracker
    sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam3_tracker_video sam3_tracker_video_mask_decoder sam3_tracker_video_prompt_encoder sam3_video
    sam3_vision_model sam3_vit_model sam_hq sam_hq_mask_decoder sam_hq_prompt_encoder sam_hq_vision_model sam_mask_decoder sam_prompt_encoder
    sam_vision_model sapiens2 sapiens2_head seggpt sew sew-d shieldgemma2 siglip2_text_model siglip2_vision_model siglip_text_model slanet
    slanext slanext_vision smolvlm smolvlm_vision speecht5_hifigan splinter step3p5 step3p5_vision step3p7 superglue superpoint swiftformer
    swin2sr t5_gemma_module t5gemma2_decoder t5gemma2_encoder t5gemma2_text table-transformer textnet time_series_transformer timesfm timesfm2_5
    timesformer timm_backbone timm_wrapper tipsv2 tipsv2_dpt tipsv2_text_model tipsv2_vision_model trocr tvp udop ultrabert ultravbert unispeech-sat
    univnet unlimited_ocr unlimited_ocr_sam_vision_model unlimited_ocr_text unlimited_ocr_vision unlimited_ocr_vision_encoder upernet uvdoc uvdoc_backbone
    vibevoice vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder vibevoice_asr
    vibevoice_diffusion video_llama_3 video_llama_3_vision video_llava videomt videoprism videoprism_text_model videoprism_vision_model vipllava
    vision-text-dual-encoder visual_bert vit_msn vitdet vitmatte vitpose vitpose_backbone vits vjepa2 voxtral voxtral_encoder voxtral_realtime
    voxtral_realtime_encoder voxtral_realtime_text wav2vec2-conformer xclip_text_model xclip_vision_model xcodec xcodec2 xglm xlnet yolos zoedepth
    """
)
"""Model types of transformers 5.23 that neither a row nor a refusal of `config.py` names."""
