_base_ = ['./mobilenet_in1k.py', '../_base_/dyrep.py']
