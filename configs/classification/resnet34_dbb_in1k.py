_base_ = ['./resnet34_in1k.py', '../_base_/dbb.py']
