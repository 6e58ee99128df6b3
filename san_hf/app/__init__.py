"""The app in the browser: `san-hf app`. All but interface.py runs without Gradio."""
