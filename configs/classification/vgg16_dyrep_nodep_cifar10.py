_base_ = './vgg16_cifar10.py'

# Without de-parameterization (section 5.5, Table 6).
custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=15, prune=False)]
