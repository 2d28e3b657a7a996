_base_ = ['./vgg16_1xb128-600e_cifar100.py', '../_base_/methods/dyrep.py']

default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), interval=15))  # t (section 5.1)
