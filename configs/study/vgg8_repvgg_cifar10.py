_base_ = ['./vgg8_cifar10.py', '../_base_/methods/repvgg.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
