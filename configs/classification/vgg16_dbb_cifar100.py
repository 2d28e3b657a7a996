_base_ = ['./vgg16_cifar100.py', '../_base_/dbb.py']
