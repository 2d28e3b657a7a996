_base_ = './resnet50_dyrep_8xb32-120e_in1k.py'

# DyRep with the 4 operations of DBB (A.1, Table 8).
default_hooks = dict(dyrep=dict(branches=['kxk', '1x1', '1x1-kxk', '1x1-avg']))
