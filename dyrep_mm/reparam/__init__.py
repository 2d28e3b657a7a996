"""What a block is: maths and modules that need torch alone and know no model."""
