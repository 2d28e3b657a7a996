_base_ = ['../_base_/vgg16_cifar.py', '../_base_/cifar100_600e.py']

model = dict(head=dict(num_classes=100))
