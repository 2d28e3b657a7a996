_base_ = [
    '../_base_/models/vgg8_cifar.py',
    '../_base_/datasets/cifar10-images_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]

# 8 by default: a study of this size takes two CPU cores some hours.
epochs = {{'$EPOCHS:8'}}

# A short schedule of the field: a warm-up, then a cosine, both by iteration.
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, end=2, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=2, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=1000)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1), logger=dict(interval=49))
