_base_ = ['./vgg8_cifar10.py', '../_base_/methods/odbb.py']

default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), warmup=2, fixed=10))
