"""Code that is shipped with exported models which no class of ``transformers`` can hold."""
