_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar10.py'

# Table 8: the 4 operations of DBB (A.1), there on ResNet-50.
default_hooks = dict(dyrep=dict(branches=['kxk', '1x1', '1x1-kxk', '1x1-avg']))
