_base_ = [
    'mmpretrain::_base_/models/resnet34.py',
    '../_base_/datasets/imagenet_bs32_jitter.py',
    '../_base_/schedules/in1k_120e.py',
]

# The authors' files start the last norm of a residual block as torchvision does, at 1.
model = dict(backbone=dict(zero_init_residual=False))
