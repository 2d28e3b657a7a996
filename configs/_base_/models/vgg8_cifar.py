# A VGG of 8 convs for 32x32 images, small enough to train many times on a CPU: 13 M multiply-adds.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='dyrep_mm.PlainVGG',
        arch=dict(num_blocks=[1, 2, 2, 2], width_factor=[1, 1, 1, 1]),
        base_channels=16,
        strides=[1, 1, 2, 2, 2],
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128, topk=(1,)),
)
