_base_ = ['./plainvgg-a2_in1k.py', '../_base_/dyrep.py']
