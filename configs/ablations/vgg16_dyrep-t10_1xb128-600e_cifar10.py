_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar10.py'

# Table 9: t, epochs between two updates (A.2).
default_hooks = dict(dyrep=dict(interval=10))
