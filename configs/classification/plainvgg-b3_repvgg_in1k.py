_base_ = ['./plainvgg-b3_in1k.py', '../_base_/repvgg.py']
