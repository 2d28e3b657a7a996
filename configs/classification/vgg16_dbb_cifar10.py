_base_ = ['./vgg16_cifar10.py', '../_base_/dbb.py']
