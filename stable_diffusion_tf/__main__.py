from stable_diffusion_tf.cli import main

main(prog_name="sdtf")
