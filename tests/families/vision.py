"""Small random KerasHub models that read images: classifiers, segmenters, detectors, depth estimators, an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise
from keras_hub.src.models.retinanet.retinanet_label_encoder import RetinaNetLabelEncoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from . import family, ids, numbers, ones

hub = keras_hub.models
Entries = dict[str, Callable[[], tuple[Any, Any]]]


def _classified(prefix: str, backbone: Callable[[], Any], x: Any, **kwargs: Any) -> Entries:
    """The backbone, and the image classifier on it."""
    classifier = getattr(hub, f"{prefix}ImageClassifier")
    return {
        f"{prefix}Backbone": lambda: (backbone(), x),
        f"{prefix}ImageClassifier": lambda: (classifier(backbone=backbone(), num_classes=3, preprocessor=None, **kwargs), x),
    }


def _resnet(stages: int, **kwargs: Any) -> Any:
    # The first stage must have 64 filters. The bottleneck block is the one that takes them from fewer.
    return hub.ResNetBackbone(
        input_conv_filters=[8],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64] + [8] * (stages - 1),
        stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1] + [2] * (stages - 1),
        block_type="bottleneck_block",
        **kwargs,
    )


def _mit() -> Any:
    return hub.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[4, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=(32, 32, 3),
        hidden_dims=[8, 16],
    )


def _hgnet(**kwargs: Any) -> Any:
    # A stage is [in, mid, out, blocks, layers, kernel size].
    return hub.HGNetV2Backbone(
        depths=[1, 1],
        embedding_size=8,
        hidden_sizes=[16, 32],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        **kwargs,
    )


def _dino_v2(size: int, patch: int, layers: int, **kwargs: Any) -> Any:
    return hub.DINOV2Backbone(
        patch_size=patch,
        num_layers=layers,
        hidden_dim=8,
        num_heads=2,
        intermediate_dim=16,
        image_shape=(size, size, 3),
        position_embedding_shape=(size, size, 3),
        **kwargs,
    )


def _vit_det(size: int, patch: int) -> Any:
    return hub.ViTDetBackbone(
        hidden_size=8,
        num_layers=2,
        intermediate_dim=16,
        num_heads=2,
        global_attention_layer_indices=[1],
        image_shape=(size, size, 3),
        patch_size=patch,
        num_output_channels=8,
        window_size=2,
    )


def _boxes() -> Any:
    # The scores of a random model are low: with no threshold, it detects something.
    return keras_hub.layers.NonMaxSuppression(
        bounding_box_format="yxyx", from_logits=True, confidence_threshold=0.0, max_detections=10
    )


@family("basnet", "segmentation")
def basnet() -> Entries:
    def backbone() -> Any:
        return hub.BASNetBackbone(image_encoder=_resnet(4), num_classes=1, image_shape=(64, 64, 3), projection_filters=8)

    x = numbers(1, 64, 64, 3)
    return {
        "BASNetBackbone": lambda: (backbone(), x),
        "BASNetImageSegmenter": lambda: (hub.BASNetImageSegmenter(backbone=backbone(), preprocessor=None), x),
    }


@family("cspnet", "vision")
def cspnet() -> Entries:
    def backbone() -> Any:
        return hub.CSPNetBackbone(
            stem_filters=8,
            stem_kernel_size=3,
            stem_strides=1,
            stackwise_depth=[1, 2],
            stackwise_strides=2,
            stackwise_num_filters=[8, 16],
            block_type="dark_block",
            stage_type="csp",
            bottle_ratio=(0.5, 1.0),
            block_ratio=(1.0, 0.5),
            expand_ratio=(2.0, 1.0),
            stem_padding="same",
            down_growth=True,
            image_shape=(32, 32, 3),
        )

    return _classified("CSPNet", backbone, numbers(2, 32, 32, 3))


@family("d_fine", "detection")
def d_fine() -> Entries:
    def backbone() -> Any:
        stages = ["stage1", "stage2"]
        return hub.DFineBackbone(
            backbone=_hgnet(use_lightweight_conv_block=[False, False], out_features=stages),
            decoder_in_channels=[16, 16],
            encoder_hidden_dim=16,
            num_labels=4,
            num_denoising=10,
            learn_initial_query=False,
            num_queries=10,
            anchor_image_size=(32, 32),
            feat_strides=[4, 8],
            num_feature_levels=2,
            hidden_dim=16,
            encoder_in_channels=[16, 32],
            encode_proj_layers=[1],
            num_attention_heads=2,
            encoder_ffn_dim=32,
            num_encoder_layers=1,
            hidden_expansion=0.5,
            depth_multiplier=0.34,
            eval_idx=-1,
            num_decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            decoder_n_points=[2, 2],
            lqe_hidden_dim=16,
            num_lqe_layers=1,
            out_features=stages,
            seed=0,
        )

    x = numbers(1, 32, 32, 3)
    return {
        "DFineBackbone": lambda: (backbone(), x),
        "DFineObjectDetector": lambda: (
            hub.DFineObjectDetector(backbone=backbone(), num_classes=4, preprocessor=None, prediction_decoder=_boxes()),
            x,
        ),
    }


@family("deeplab_v3", "segmentation")
def deeplab_v3() -> Entries:
    def backbone() -> Any:
        return hub.DeepLabV3Backbone(
            image_encoder=_resnet(3),
            spatial_pyramid_pooling_key="P4",
            upsampling_size=4,
            dilation_rates=[1, 2, 3],
            low_level_feature_key="P2",
            projection_filters=8,
            image_shape=(32, 32, 3),
        )

    x = numbers(1, 32, 32, 3)
    return {
        "DeepLabV3Backbone": lambda: (backbone(), x),
        "DeepLabV3ImageSegmenter": lambda: (
            hub.DeepLabV3ImageSegmenter(backbone=backbone(), num_classes=3, preprocessor=None),
            x,
        ),
    }


@family("deit", "vision")
def deit() -> Entries:
    def backbone() -> Any:
        return hub.DeiTBackbone(
            image_shape=(16, 16, 3), patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16
        )

    return _classified("DeiT", backbone, numbers(2, 16, 16, 3))


@family("densenet", "vision")
def densenet() -> Entries:
    def backbone() -> Any:
        return hub.DenseNetBackbone(stackwise_num_repeats=[1, 2], growth_rate=4, image_shape=(32, 32, 3))

    return _classified("DenseNet", backbone, numbers(2, 32, 32, 3))


@family("depth_anything", "depth")
def depth_anything() -> Entries:
    def backbone() -> Any:
        return hub.DepthAnythingBackbone(
            image_encoder=_dino_v2(24, 4, 4, apply_layernorm=True),
            reassemble_factors=[4, 2, 1, 0.5],
            neck_hidden_dims=[8, 8, 16, 16],
            fusion_hidden_dim=8,
            head_hidden_dim=8,
            head_in_index=-1,
            feature_keys=["stage1", "stage2", "stage3", "stage4"],
        )

    x = numbers(1, 24, 24, 3)
    return {
        "DepthAnythingBackbone": lambda: (backbone(), x),
        "DepthAnythingDepthEstimator": lambda: (
            hub.DepthAnythingDepthEstimator(
                backbone=backbone(), depth_estimation_type="metric", max_depth=10.0, preprocessor=None
            ),
            x,
        ),
    }


@family("dinov2", "vision")
def dinov2() -> Entries:
    x = {"images": numbers(2, 16, 16, 3)}
    return {"DINOV2Backbone": lambda: (_dino_v2(16, 4, 2, num_register_tokens=2, use_swiglu_ffn=True), x)}


@family("dinov3", "vision")
def dinov3() -> Entries:
    def backbone() -> Any:
        return hub.DINOV3Backbone(
            patch_size=4,
            num_layers=2,
            hidden_dim=8,
            num_heads=2,
            intermediate_dim=16,
            num_register_tokens=2,
            use_gated_mlp=True,
            image_shape=(16, 16, 3),
        )

    return {"DINOV3Backbone": lambda: (backbone(), {"pixel_values": numbers(2, 16, 16, 3)})}


@family("efficientnet", "vision")
def efficientnet() -> Entries:
    def backbone() -> Any:
        return hub.EfficientNetBackbone(
            stackwise_width_coefficients=[1.0] * 4,
            stackwise_depth_coefficients=[1.0] * 4,
            stackwise_kernel_sizes=[3, 3, 3, 3],
            stackwise_num_repeats=[1, 1, 1, 2],
            stackwise_input_filters=[8, 8, 8, 16],
            stackwise_output_filters=[8, 8, 16, 16],
            stackwise_expansion_ratios=[1, 2, 2, 2],
            stackwise_squeeze_and_excite_ratios=[0, 0, 0.25, 0.25],
            stackwise_strides=[1, 2, 1, 2],
            stackwise_block_types=["cba", "fused", "unfused", "v1"],
            dropout=0.0,
            input_shape=(32, 32, 3),
            num_features=16,
        )

    return _classified("EfficientNet", backbone, numbers(2, 32, 32, 3))


@family("hgnetv2", "vision")
def hgnetv2() -> Entries:
    def backbone() -> Any:
        return _hgnet(use_lightweight_conv_block=[False, True], image_shape=(32, 32, 3))

    return _classified("HGNetV2", backbone, numbers(2, 32, 32, 3))


@family("mit", "vision")
def mit() -> Entries:
    return _classified("MiT", _mit, numbers(2, 32, 32, 3))


@family("mobilenet", "vision")
def mobilenet() -> Entries:
    def backbone() -> Any:
        return hub.MobileNetBackbone(
            stackwise_expansion=[[16], [16, 24]],
            stackwise_num_blocks=[1, 2],
            stackwise_num_filters=[[8], [16, 16]],
            stackwise_kernel_size=[[3], [5, 5]],
            stackwise_num_strides=[[2], [2, 1]],
            stackwise_se_ratio=[[None], [0.25, 0.25]],
            stackwise_activation=[["relu"], ["hard_swish", "hard_swish"]],
            stackwise_padding=[[1], [2, 2]],
            output_num_filters=16,
            depthwise_filters=8,
            depthwise_stride=1,
            depthwise_residual=True,
            last_layer_filter=32,
            squeeze_and_excite=0.5,
            image_shape=(32, 32, 3),
            input_num_filters=8,
        )

    return _classified("MobileNet", backbone, numbers(2, 32, 32, 3), num_features=16)


@family("mobilenetv5", "vision")
def mobilenetv5() -> Entries:
    # A block is written as in timm: the kind, then r(epeats), k(ernel), s(tride), e(xpansion), c(hannels), h(eads), ...
    stages = [
        ["er_r1_k3_s2_e2_c8"],
        ["uir_r1_a3_k5_s2_e2_c16"],
        ["uir_r1_a5_k0_s2_e2_c16", "mqa_r1_k3_h2_s1_d8_v2_c16", "mha_r1_k3_h2_s1_d8_v1_c16"],
    ]

    def backbone() -> Any:
        return hub.MobileNetV5Backbone(
            **convert_arch_def_to_stackwise(stages),
            stem_size=8,
            num_features=16,
            msfa_output_resolution=4,
            layer_scale_init_value=1e-5,
            image_shape=(64, 64, 3),
        )

    return _classified("MobileNetV5", backbone, numbers(2, 64, 64, 3))


@family("resnet", "vision")
def resnet() -> Entries:
    def backbone() -> Any:
        return _resnet(2, image_shape=(32, 32, 3))

    return _classified("ResNet", backbone, numbers(2, 32, 32, 3))


@family("retinanet", "detection")
def retinanet() -> Entries:
    def backbone() -> Any:
        return hub.RetinaNetBackbone(
            image_encoder=_resnet(3), min_level=3, max_level=4, use_p5=False, image_shape=(64, 64, 3)
        )

    def detector() -> Any:
        anchors = keras_hub.layers.AnchorGenerator(
            bounding_box_format="yxyx", min_level=3, max_level=4, num_scales=3, aspect_ratios=[0.5, 1.0, 2.0], anchor_size=4
        )
        return hub.RetinaNetObjectDetector(
            backbone=backbone(),
            num_classes=3,
            anchor_generator=anchors,
            label_encoder=RetinaNetLabelEncoder(bounding_box_format="yxyx", anchor_generator=anchors),
            classification_head_prior_probability=0.5,
            pre_logits_num_conv_layers=1,
            prediction_decoder=_boxes(),
            preprocessor=None,
        )

    x = numbers(1, 64, 64, 3)
    return {"RetinaNetBackbone": lambda: (backbone(), x), "RetinaNetObjectDetector": lambda: (detector(), x)}


@family("sam", "segmentation")
def sam() -> Entries:
    def backbone() -> Any:
        return hub.SAMBackbone(
            image_encoder=_vit_det(64, 16),
            prompt_encoder=keras_hub.layers.SAMPromptEncoder(
                hidden_size=8, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_channels=4
            ),
            mask_decoder=keras_hub.layers.SAMMaskDecoder(
                hidden_size=8,
                num_layers=2,
                intermediate_dim=16,
                num_heads=2,
                embedding_dim=8,
                num_multimask_outputs=3,
                iou_head_depth=3,
                iou_head_hidden_dim=8,
            ),
        )

    x = {
        "images": numbers(1, 64, 64, 3),
        "points": np.full((1, 1, 2), 20, "float32"),
        "labels": np.ones((1, 1), "float32"),
        "boxes": np.array([[[[8, 8], [40, 40]]]], "float32"),
        "masks": numbers(1, 1, 16, 16, 1),
    }
    return {
        "SAMBackbone": lambda: (backbone(), x),
        "SAMImageSegmenter": lambda: (hub.SAMImageSegmenter(backbone=backbone(), preprocessor=None), x),
    }


@family("sam3", "segmentation")
def sam3() -> Entries:
    layers, shape = keras_hub.layers, (28, 28, 3)
    # On torch, a box as prompt needs torchvision.
    boxes = int(keras.backend.backend() != "torch" or find_spec("torchvision") is not None)
    block = {"hidden_dim": 8, "intermediate_dim": 16, "num_heads": 2}

    def backbone() -> Any:
        return hub.SAM3PromptableConceptBackbone(
            vision_encoder=layers.SAM3VisionEncoder(
                image_shape=shape,
                patch_size=14,
                fpn_hidden_dim=8,
                fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
                pretrain_image_shape=(42, 42, 3),
                window_size=2,
                global_attn_indexes=[1],
                num_layers=2,
                **block,
            ),
            text_encoder=layers.SAM3TextEncoder(vocabulary_size=32, embedding_dim=8, num_layers=1, **block),
            geometry_encoder=layers.SAM3GeometryEncoder(roi_size=7, num_layers=1, **block),
            detr_encoder=layers.SAM3DetrEncoder(num_layers=1, **block),
            detr_decoder=layers.SAM3DetrDecoder(image_shape=shape, patch_size=14, num_queries=4, num_layers=1, **block),
            mask_decoder=layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=8, num_heads=2),
        )

    x = {
        "pixel_values": numbers(1, *shape),
        "token_ids": ids(1, 6, below=32),
        "padding_mask": ones(1, 6),
        "boxes": np.array([[[0.2, 0.2, 0.4, 0.4, 0.0]]], "float32")[:, :boxes],
        "box_labels": ones(1, boxes),
    }
    return {
        "SAM3PromptableConceptBackbone": lambda: (backbone(), x),
        "SAM3PromptableConceptImageSegmenter": lambda: (
            hub.SAM3PromptableConceptImageSegmenter(backbone=backbone(), preprocessor=None),
            x,
        ),
    }


@family("segformer", "segmentation")
def segformer() -> Entries:
    def backbone() -> Any:
        return hub.SegFormerBackbone(image_encoder=_mit(), projection_filters=8)

    x = numbers(2, 32, 32, 3)
    return {
        "SegFormerBackbone": lambda: (backbone(), x),
        "SegFormerImageSegmenter": lambda: (
            hub.SegFormerImageSegmenter(backbone=backbone(), num_classes=3, preprocessor=None),
            x,
        ),
    }


@family("swin_transformer", "vision")
def swin_transformer() -> Entries:
    def backbone() -> Any:
        return hub.SwinTransformerBackbone(
            image_shape=(16, 16, 3), embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=2, patch_size=2, drop_path=0.0
        )

    return _classified("SwinTransformer", backbone, numbers(2, 16, 16, 3))


@family("vae", "autoencoder")
def vae() -> Entries:
    def backbone() -> Any:
        return VAEBackbone(
            encoder_num_filters=[32, 32],
            encoder_num_blocks=[1, 1],
            decoder_num_filters=[32, 32],
            decoder_num_blocks=[1, 1],
            sampler_method="mode",
            sample_channels=8,
        )

    return {"VAEBackbone": lambda: (backbone(), numbers(1, 16, 16, 3))}


@family("vgg", "vision")
def vgg() -> Entries:
    def backbone() -> Any:
        return hub.VGGBackbone(stackwise_num_repeats=[1, 2], stackwise_num_filters=[8, 16], image_shape=(16, 16, 3))

    return _classified("VGG", backbone, numbers(2, 16, 16, 3), pooling="flatten", pooling_hidden_dim=8)


@family("vit", "vision")
def vit() -> Entries:
    def backbone() -> Any:
        return hub.ViTBackbone(image_shape=(16, 16, 3), patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)

    return _classified("ViT", backbone, numbers(2, 16, 16, 3))


@family("vit_det", "vision")
def vit_det() -> Entries:
    return {"ViTDetBackbone": lambda: (_vit_det(16, 2), numbers(1, 16, 16, 3))}


@family("xception", "vision")
def xception() -> Entries:
    def backbone() -> Any:
        return hub.XceptionBackbone(
            stackwise_conv_filters=[[8, 8], [16, 16], [16, 16]],
            stackwise_pooling=[False, True, False],
            image_shape=(32, 32, 3),
        )

    return _classified("Xception", backbone, numbers(2, 32, 32, 3))


#: What has no entry, and why.
NOT_BUILT: dict[str, str] = {}
