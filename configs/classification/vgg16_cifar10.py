_base_ = ['../_base_/vgg16_cifar.py', '../_base_/cifar10_600e.py']
