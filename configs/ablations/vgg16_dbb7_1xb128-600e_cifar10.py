_base_ = ['../classification/vgg16_1xb128-600e_cifar10.py', '../_base_/methods/dbb7.py']

# Table 8: DBB with DyRep's 7 operations (A.1), there on ResNet-50.
default_hooks = dict(dyrep=_base_.pop('dyrep'))
