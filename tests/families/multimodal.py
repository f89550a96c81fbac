"""The KerasHub families that take more than one kind of input: images, audio or video with text, and diffusion."""

from __future__ import annotations

from types import SimpleNamespace

import keras_hub
import numpy as np
from keras_hub.src.models.gemma3n.gemma3n_audio_encoder import Gemma3nAudioEncoder
from keras_hub.src.models.mobilenetv5.mobilenetv5_backbone import MobileNetV5Backbone
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise
from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from families import family, ids, numbers, ones

hub = keras_hub.models


def tasks(backbone, x, *names):
    """Builders of the tasks named, with no preprocessor."""

    def task(name):
        return lambda: (getattr(hub, name)(backbone=backbone(), preprocessor=None), x)

    return {name: task(name) for name in names}


def entries(backbone, x, name, *task_names):
    """Builders of the backbone and of its tasks."""
    return {name: lambda: (backbone(), x)} | tasks(backbone, x, *task_names)


def text(prefix="", length=5, below=20):
    return {f"{prefix}token_ids": ids(2, length, below=below), f"{prefix}padding_mask": ones(2, length)}


def text_pair():
    return text("encoder_", 6) | text("decoder_", 5)


def places(length, *at):
    """Which of the positions are of an image or of audio: their indices, and a mask."""
    return np.tile(np.array(at, "int32"), (2, 1)), np.tile(np.isin(np.arange(length), at).astype("int32"), (2, 1))


@family("blip2", "image and text")
def blip2():
    images = {"images": numbers(2, 16, 16, 3)}
    block = {"num_layers": 1, "num_heads": 2, "intermediate_dim": 16}

    def backbone(language_model, **arguments):
        return hub.BLIP2Backbone(
            vision_encoder=hub.BLIP2VisionEncoder(
                **block,
                image_size=16,
                patch_size=8,
                hidden_dim=16,
                use_patch_bias=True,
                use_class_token=True,
                use_mha_bias=True,
                use_mlp_bias=True,
                dropout_rate=0.0,
                layer_norm_epsilon=1e-5,
                initializer_range=0.02,
            ),
            qformer=hub.BLIP2QFormer(
                **block,
                num_query_tokens=2,
                hidden_dim=8,
                vision_dim=16,
                cross_attention_frequency=1,
                dropout=0.0,
                layer_norm_epsilon=1e-5,
            ),
            language_model=language_model(
                **block,
                **arguments,
                vocabulary_size=20,
                hidden_dim=8,
                num_query_tokens=2,
                qformer_hidden_dim=8,
                dropout=0.0,
            ),
        )

    def with_opt():
        return backbone(hub.BLIP2CustomOPT, max_sequence_length=10)

    def with_t5():
        return backbone(hub.BLIP2FlanT5, key_value_dim=4)

    seq2seq = tasks(with_t5, images | text_pair(), "BLIP2Seq2SeqLM")
    return entries(with_opt, images | text(), "BLIP2Backbone", "BLIP2CausalLM") | seq2seq


def image_and_text(name, text_length, **arguments):
    """CLIP and the families built like it: one encoder of images and one of text."""
    size = {"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "intermediate_dim": 16}

    def backbone():
        vision = getattr(hub, f"{name}VisionEncoder")
        words = getattr(hub, f"{name}TextEncoder")
        return getattr(hub, f"{name}Backbone")(
            vision_encoder=vision(**size, patch_size=8, image_shape=(16, 16, 3)),
            text_encoder=words(**size, vocabulary_size=20, embedding_dim=8, max_sequence_length=text_length),
            **arguments,
        )

    x = {"images": numbers(2, 16, 16, 3), "token_ids": ids(2, text_length, below=20)}
    return entries(backbone, x, f"{name}Backbone")


@family("clip", "image and text")
def clip():
    return image_and_text("CLIP", 5, projection_dim=8)


@family("metaclip_2", "image and text")
def metaclip_2():
    return image_and_text("MetaCLIP2", 5, projection_dim=8)


@family("siglip", "image and text")
def siglip():
    return image_and_text("SigLIP", 5)


@family("edrec", "recommendation")
def edrec():
    def backbone():
        return hub.EdRecBackbone(
            vocab_size=20,
            num_layers_enc=1,
            num_layers_dec=1,
            hidden_dim=8,
            intermediate_dim=16,
            num_heads=2,
        )

    return entries(backbone, text_pair(), "EdRecBackbone", "EdRecSeq2SeqLM")


@family("rqvae", "recommendation")
def rqvae():
    def backbone():
        return RQVAEBackbone(
            input_dim=16,
            encoder_layer_dims=[16, 8],
            output_dim=4,
            decoder_layer_dims=[8, 16],
            num_embeddings=4,
            num_quantizers=2,
        )

    return entries(backbone, numbers(2, 16), "RQVAEBackbone")


@family("flux", "diffusion")
def flux():
    def backbone():
        return hub.FluxBackbone(
            input_channels=8,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[2, 2, 4],
            theta=10_000,
            use_bias=True,
            guidance_embed=True,
            image_shape=(4, 8),
            text_shape=(5, 12),
            image_ids_shape=(4, 3),
            text_ids_shape=(5, 3),
            y_shape=(8,),
        )

    x = {
        "image": numbers(2, 4, 8),
        "image_ids": numbers(2, 4, 3),
        "text": numbers(2, 5, 12),
        "text_ids": numbers(2, 5, 3),
        "y": numbers(2, 8),
        "timesteps": numbers(2),
        "guidance": numbers(2),
    }
    return entries(backbone, x, "FluxBackbone", "FluxTextToImage")


@family("stable_diffusion_3", "diffusion")
def stable_diffusion_3():
    def clip_text(name):
        return hub.CLIPTextEncoder(
            vocabulary_size=20,
            embedding_dim=8,
            hidden_dim=8,
            num_layers=2,
            num_heads=2,
            intermediate_dim=16,
            intermediate_output_index=-2,
            name=name,
        )

    def backbone():
        widths, blocks = [32] * 4, [1] * 4  # the VAE normalizes in 32 groups
        model = hub.StableDiffusion3Backbone(
            mmdit_patch_size=2,
            mmdit_hidden_dim=16,
            mmdit_num_layers=2,
            mmdit_num_heads=2,
            mmdit_position_size=8,
            mmdit_qk_norm="rms_norm",
            mmdit_dual_attention_indices=(0,),
            vae=VAEBackbone(widths, blocks, widths, blocks, sampler_method="mode", name="vae"),
            clip_l=clip_text("clip_l"),
            clip_g=clip_text("clip_g"),
            image_shape=(32, 32, 3),
        )
        model.configure_scheduler(2)  # else the first call makes the schedule from its input, which JAX cannot trace
        return model

    names = [f"{encoder}_{kind}" for encoder in ("clip_l", "clip_g") for kind in ("token_ids", "negative_token_ids")]
    x = {
        "images": numbers(2, 32, 32, 3),
        "latents": numbers(2, 4, 4, 16),
        "num_steps": 2 * ones(2),
        "guidance_scale": np.ones(2, "float32"),
    } | {name: ids(2, 5, below=20) for name in names}
    kinds = "Backbone", "TextToImage", "ImageToImage", "Inpaint"
    return entries(backbone, x, *(f"StableDiffusion3{kind}" for kind in kinds))


def gemma3_vision_encoder():
    return hub.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        output_dim=8,
    )


@family("gemma3_vision", "image and text")
def gemma3_vision():
    def backbone():
        return hub.Gemma3Backbone(
            vocabulary_size=20,
            image_size=16,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=16,
            head_dim=4,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=4,
            vision_encoder=gemma3_vision_encoder(),
        )

    indices, mask = places(8, 1, 2, 3, 4)
    x = text(length=8) | {"images": numbers(2, 1, 16, 16, 3), "vision_indices": indices, "vision_mask": mask}
    return entries(backbone, x, "Gemma3Backbone", "Gemma3CausalLM", "Gemma3TextEmbedder")


@family("t5gemma2", "encoder-decoder")
def t5gemma2():
    size = {
        "hidden_dim": 8,
        "intermediate_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }

    def backbone():
        return hub.T5Gemma2Backbone(
            vocabulary_size=20,
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in size.items()},
            sliding_window=4,
            attn_logit_softcapping=50.0,
            vision_encoder=gemma3_vision_encoder(),
            eoi_token_index=19,
        )

    indices, _ = places(8, 1, 2, 3, 4)
    x = text("encoder_", 8) | text("decoder_") | {"images": numbers(2, 1, 16, 16, 3), "vision_indices": indices}
    return entries(backbone, x, "T5Gemma2Backbone", "T5Gemma2Seq2SeqLM")


@family("gemma3n", "image, audio and text")
def gemma3n():
    def backbone():
        vision = MobileNetV5Backbone(
            **convert_arch_def_to_stackwise([["er_r1_k3_s1_e1_c8"]]),
            num_features=4,
            image_shape=(16, 16, 3),
            use_msfa=False,
        )
        audio = Gemma3nAudioEncoder(
            hidden_size=8,
            input_feat_size=8,
            sscp_conv_channel_size=[2, 4],
            sscp_conv_kernel_size=[(1, 1), (1, 1)],
            sscp_conv_stride_size=[(2, 2), (2, 2)],
            sscp_conv_group_norm_eps=1e-5,
            num_hidden_layers=1,
            rms_norm_eps=1e-6,
            gradient_clipping=1.0,
            residual_weight=0.5,
            num_attention_heads=2,
            attention_chunk_size=2,
            num_attention_context_right=1,
            num_attention_context_left=1,
            attention_logit_cap=50.0,
            conv_kernel_size=3,
            reduction_factor=1,
        )
        return hub.Gemma3nBackbone(
            text_vocab_size=20,
            text_hidden_size=8,
            num_hidden_layers=2,
            pad_token_id=0,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=[16, 16],
            hidden_activation="gelu_approximate",
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
            rope_theta=10_000.0,
            max_position_embeddings=8,
            vocab_size_per_layer_input=20,
            hidden_size_per_layer_input=2,
            altup_num_inputs=2,
            laurel_rank=2,
            vision_encoder_config=vision.get_config(),
            vision_hidden_size=8,
            vision_vocab_offset=12,
            vision_vocab_size=4,
            vision_soft_tokens_per_image=2,
            image_token_id=10,
            audio_encoder_config=audio.get_config(),
            audio_hidden_size=8,
            audio_vocab_offset=16,
            audio_vocab_size=4,
            audio_soft_tokens_per_image=2,
            audio_token_id=11,
        )

    x = text(length=8, below=10) | {
        "images": numbers(2, 1, 16, 16, 3),
        "input_features": numbers(2, 1, 8, 8),
        "input_features_mask": np.zeros((2, 1, 8), "bool"),  # true is padding
    }
    x["token_ids"][:, 1:3] = 10
    x["token_ids"][:, 4:6] = 11
    # The task asks for these as well, and makes no use of them.
    (image_indices, image_mask), (audio_indices, audio_mask) = places(8, 1, 2), places(8, 4, 5)
    more = {
        "vision_indices": image_indices,
        "vision_mask": image_mask.astype(bool),
        "audio_indices": audio_indices,
        "audio_mask": audio_mask.astype(bool),
    }
    return entries(backbone, x, "Gemma3nBackbone") | tasks(backbone, x | more, "Gemma3nCausalLM")


def gemma4_backbone(**arguments):
    return hub.Gemma4Backbone(
        vocabulary_size=20,
        image_size=16,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=4,
        sliding_window_size=4,
        **arguments,
    )


def gemma4_text(length=10):
    return text(length=length) | {"position_ids": np.tile(np.arange(length, dtype="int32"), (2, 1))}


@family("gemma4", "image, audio and text")
def gemma4():
    def backbone():
        return gemma4_backbone(
            num_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=2,
            vision_encoder=hub.Gemma4VisionEncoder(
                image_size=16,
                patch_size=4,
                pool_size=2,
                num_layers=1,
                num_heads=2,
                head_dim=4,
                num_key_value_heads=2,
                hidden_dim=8,
                intermediate_dim=16,
                output_dim=8,
                position_embedding_size=8,
            ),
            audio_encoder=hub.Gemma4AudioEncoder(
                input_feat_size=8,
                hidden_size=8,
                num_heads=2,
                num_layers=1,
                chunk_size=4,
                context_left=5,
                context_right=0,
                sscp_conv_channels=(4, 2),
                output_proj_dims=8,
                output_dim=8,
            ),
            num_audio_tokens_per_clip=2,
        )

    indices, mask = places(10, 1, 2, 3, 4)
    audio_indices, audio_mask = places(10, 6, 7)
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(16, 2).astype("int32")
    x = gemma4_text() | {
        "pixel_values": numbers(2, 1, 16, 48),
        "pixel_position_ids": np.tile(grid, (2, 1, 1, 1)),
        "vision_indices": indices,
        "vision_mask": mask,
        "audio_mel": numbers(2, 1, 8, 8),
        "audio_mel_mask": ones(2, 1, 8),
        "audio_indices": audio_indices,
        "audio_mask": audio_mask,
    }
    return entries(backbone, x, "Gemma4Backbone", "Gemma4CausalLM")


@family("gemma4_moe", "mixture of experts")
def gemma4_moe():
    def backbone():
        return gemma4_backbone(
            num_layers=2,
            layer_types=["sliding_attention", "full_attention"],
            num_global_key_value_heads=1,
            global_head_dim=8,
            enable_moe_block=True,
            num_experts=4,
            expert_intermediate_dim=8,
            num_experts_per_token=2,
        )

    return entries(backbone, gemma4_text(), "Gemma4Backbone", "Gemma4CausalLM")


@family("moonshine", "audio")
def moonshine():
    def backbone():
        return hub.MoonshineBackbone(
            vocabulary_size=20,
            filter_dim=16,
            encoder_num_layers=1,
            decoder_num_layers=1,
            hidden_dim=16,
            intermediate_dim=32,
            encoder_num_heads=2,
            decoder_num_heads=2,
        )

    x = {"encoder_input_values": numbers(2, 3000, 1), "encoder_padding_mask": ones(2, 3000)} | text("decoder_")
    return entries(backbone, x, "MoonshineBackbone", "MoonshineAudioToText")


@family("whisper", "audio")
def whisper():
    def backbone():
        return hub.WhisperBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            num_mels=8,
            max_encoder_sequence_length=10,
            max_decoder_sequence_length=6,
        )

    return entries(backbone, {"encoder_features": numbers(2, 10, 8)} | text("decoder_"), "WhisperBackbone")


@family("pali_gemma", "image and text")
def pali_gemma():
    def backbone():
        return hub.PaliGemmaBackbone(
            vocabulary_size=20,
            image_size=16,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=16,
            head_dim=4,
            vit_patch_size=8,
            vit_num_heads=2,
            vit_hidden_dim=8,
            vit_num_layers=1,
            vit_intermediate_dim=16,
        )

    x = text() | {"images": numbers(2, 16, 16, 3), "response_mask": np.zeros((2, 5), "int32")}
    return entries(backbone, x, "PaliGemmaBackbone", "PaliGemmaCausalLM")


@family("parseq", "scene text")
def parseq():
    def backbone():
        return hub.PARSeqBackbone(
            image_encoder=hub.ViTBackbone(
                image_shape=(16, 32, 3),
                patch_size=(8, 8),
                num_layers=1,
                num_heads=2,
                hidden_dim=8,
                mlp_dim=16,
                use_class_token=False,
                name="image_encoder",
            ),
            vocabulary_size=20,
            max_label_length=5,
            decoder_hidden_dim=8,
            num_decoder_layers=1,
            num_decoder_heads=2,
            decoder_mlp_dim=16,
            dropout_rate=0.0,
            attention_dropout=0.0,
        )

    def causal_lm():
        # Its constructor compiles it, for which it wants the padding id of a tokenizer; the real one needs tensorflow-text.
        preprocessor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=19))
        model = hub.PARSeqCausalLM(backbone=backbone(), preprocessor=preprocessor)
        model.preprocessor = None
        return model

    x = {"images": numbers(2, 16, 32, 3)} | text()
    return entries(backbone, x, "PARSeqBackbone") | {"PARSeqCausalLM": lambda: (causal_lm(), x)}


@family("video_prism", "video")
def video_prism():
    def backbone():
        return hub.VideoPrismBackbone(
            num_frames=2,
            patch_size=4,
            hidden_dim=8,
            intermediate_dim=16,
            num_heads=2,
            num_spatial_layers=1,
            num_temporal_layers=1,
            num_auxiliary_layers=1,
            vocabulary_size=20,
            num_text_layers=1,
            attention_logit_soft_cap=50.0,
            image_shape=(8, 8, 3),
        )

    return entries(backbone, {"pixel_values": numbers(2, 2, 8, 8, 3)} | text(), "VideoPrismBackbone")


#: Classes without an entry, and why.
NOT_BUILT = {
    "gemma4/Gemma4AssistantCausalLM": "It is built, but its `call` raises: only a target model's `generate` may run it."
}
