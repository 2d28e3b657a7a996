_base_ = './vgg8_dyrep-gain_cifar10.py'

default_hooks = dict(dyrep=dict(branch_norm='fixed'))
