# Stage C of the pairs on BCCD and CamVid: their backbone learns to classify first.
_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    '../_base_/datasets/cifar10-images-64_bs256.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=10, topk=(1,)))

# A warm-up, then a cosine, both by iteration, as in vgg8_cifar10.py.
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, by_epoch=True, convert_to_iter_based=True),
]
# Three epochs take one CPU core 24 minutes, and 55 with DyRep.
epochs = 3
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1), logger=dict(interval=49))
