_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/in1k_120e.py']
