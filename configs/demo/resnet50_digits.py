"""Stage C of the demo: a ResNet-50 learns single digits; its backbone starts the detector.

python tools/digits.py writes the data.
"""

_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

model = dict(head=dict(num_classes=10, topk=(1,)))
data_preprocessor = dict(num_classes=10)

# The crops are 64 pixels: nothing is cut off, and no flip, for a mirrored digit is none.
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(
    data_root='data/digits/crops',
    metainfo=dict(classes=tuple('0123456789')),
    pipeline=pipeline,
)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

# 150 iterations from nothing. Fused: a step of the plain AdamW takes four times as long here.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
)
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=3, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=3, save_optimizer=False))
randomness = dict(seed=0)
