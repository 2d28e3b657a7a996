_base_ = '../_base_/in1k_200e_strong.py'

# RepVGG-B3 without its branches: the stack that DyRep starts from (section 5.3).
model = dict(
    type='ImageClassifier',
    backbone=dict(type='dyrep_mm.PlainVGG', arch='B3'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2560,
        topk=(1, 5),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=1000),
    ),
)
