"""What people look at: a page of figures on what runs did, made of their records and logs."""
