_base_ = ['./vgg8_cifar10.py', '../_base_/methods/dbb-scratch.py']

default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), branch_norm='fixed'))
