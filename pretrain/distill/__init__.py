"""Distillation: which attention layers matter least, recurrent ones in their place, and training with a teacher."""
