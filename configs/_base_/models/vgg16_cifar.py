# VGG-16 for 32x32 images as DBB and Table 2 have it: global average pooling and one hidden linear
# layer of 512 in place of the two of 4096.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VGG', depth=16, norm_cfg=dict(type='BN')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=10,
        in_channels=512,
        mid_channels=[512],
        topk=(1,),
    ),
)
