_base_ = ['./resnet18_in1k.py', '../_base_/dbb.py']
