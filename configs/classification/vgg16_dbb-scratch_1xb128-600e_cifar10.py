_base_ = ['./vgg16_1xb128-600e_cifar10.py', '../_base_/methods/dbb-scratch.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
