"""Models in stages: outer ones read every byte, inner ones only the chunks that bytes are gathered into."""
