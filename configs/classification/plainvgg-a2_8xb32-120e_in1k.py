_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',  # crops and flips alone (section 5.1)
    '../_base_/schedules/in1k_120e.py',
]

# RepVGG-A2 without its branches: the stack that DyRep starts from (section 5.3).
model = dict(
    type='ImageClassifier',
    backbone=dict(type='dyrep_mm.PlainVGG', arch='A2'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1408,
        topk=(1, 5),
    ),
)
