_base_ = [
    '../_base_/models/vgg16_cifar.py',
    '../_base_/datasets/cifar10_bs128.py',
    '../_base_/schedules/cifar_600e.py',
]
