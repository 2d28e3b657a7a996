_base_ = [
    '../_base_/datasets/imagenet_bs32_autoaug.py',
    '../_base_/schedules/in1k_200e.py',
]

# RepVGG-B2g4 without its branches: the stack that DyRep starts from (section 5.3).
model = dict(
    type='ImageClassifier',
    backbone=dict(type='dyrep_mm.PlainVGG', arch='B2g4'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2560,
        topk=(1, 5),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=1000),
    ),
)
