_base_ = ['./plainvgg-b2g4_in1k.py', '../_base_/repvgg.py']
