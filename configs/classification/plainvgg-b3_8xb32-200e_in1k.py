_base_ = './plainvgg-b2g4_8xb32-200e_in1k.py'

# RepVGG-B3 without its branches: the stack that DyRep starts from (section 5.3).
model = dict(backbone=dict(arch='B3'))
