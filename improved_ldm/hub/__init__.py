"""What turns a trained folder into a model that others find and understand."""
