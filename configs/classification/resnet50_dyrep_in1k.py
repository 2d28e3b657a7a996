_base_ = ['./resnet50_in1k.py', '../_base_/dyrep.py']
