"""Text of a source -> shards of token ids on disk, or in memory; and looking at what was written.

``reading`` cuts the documents into shards, ``encoding`` tokenizes them in one process or in several, ``directory``
writes a prepared directory that survives being killed, ``manifest`` says what such a directory holds, ``verifying``
and ``inspecting`` look at it. This module imports nothing.
"""
