"""Speech whose mouth is known: voices, sentences, mouths, and sound that is no speech."""
