"""What do Keras and the backends hide? Every private name of Keras, every use of a backend, every quantisation mode."""
