_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar10.py'

# Table 6: without de-parameterization (section 5.5).
default_hooks = dict(dyrep=dict(prune=False))
