_base_ = './vgg16_dyrep_1xb128-600e_cifar10.py'

# Without de-parameterization (section 5.5, Table 6).
default_hooks = dict(dyrep=dict(prune=False))
