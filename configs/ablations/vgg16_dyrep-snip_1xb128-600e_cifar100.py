_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar100.py'

# Table 10: another score (A.3).
default_hooks = dict(dyrep=dict(metric='snip'))
