_base_ = [
    '../_base_/datasets/imagenet_bs32_jitter.py',
    '../_base_/schedules/in1k_90e_mobilenet.py',
]

# MobileNet V1 of timm, which no OpenMMLab library has.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='TIMMBackbone', model_name='mobilenetv1_100'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=1024, topk=(1, 5)),
)
